set -e
export BC_LINE_LENGTH=0
bc -lq sh/pi.bc
echo 'scale=60; e(1); l(2); s(1.5); sqrt(2); 2^1000; obase=16; 123456789012345678901234567890' | bc -lq
