for i in 1 2 3 4 5; do
    python3 -I -c "print($i)"
done
