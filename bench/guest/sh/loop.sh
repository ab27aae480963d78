i=0
s=0
while [ $i -lt 300000 ]; do
    s=$(((s * 7 + i) % 65521))
    i=$((i + 1))
done
echo $s
