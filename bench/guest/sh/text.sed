s/([a-z]+) ([a-z]+)/\2 \1/g
s/[aeiou]/<&>/3
/th<.>/p
