set -e
d=$(mktemp -d "$TMPDIR/ssl.XXXXXX")
trap 'rm -rf "$d"' EXIT
for m in md5 sha1 sha256 sha512 sha3-256 blake2s256 sm3; do
    openssl dgst -$m data/text.txt
done
for c in aes-128-cbc aes-256-ctr aes-256-cbc chacha20 camellia-128-cbc; do
    openssl enc -$c -K 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff -iv 0102030405060708090a0b0c0d0e0f10 \
        -in data/log.txt -out "$d/c" 2>/dev/null
    echo "$c $(sha256sum <"$d/c")"
    openssl enc -d -$c -K 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff -iv 0102030405060708090a0b0c0d0e0f10 \
        -in "$d/c" 2>/dev/null | cmp - data/log.txt
done
openssl genrsa -out "$d/rsa.pem" 2048 2>/dev/null
openssl ecparam -name prime256v1 -genkey -noout -out "$d/ec.pem"
openssl genpkey -algorithm ed25519 -out "$d/ed.pem"
for k in rsa ec; do
    openssl pkey -in "$d/$k.pem" -pubout -out "$d/$k.pub"
    openssl dgst -sha256 -sign "$d/$k.pem" -out "$d/sig" data/log.txt
    openssl dgst -sha256 -verify "$d/$k.pub" -signature "$d/sig" data/log.txt
    openssl dgst -sha256 -verify "$d/$k.pub" -signature "$d/sig" data/text.txt 2>/dev/null || echo "another file: refused"
done
openssl pkey -in "$d/ed.pem" -pubout -out "$d/ed.pub"
openssl pkeyutl -sign -inkey "$d/ed.pem" -rawin -in src/sample.c -out "$d/sig"
openssl pkeyutl -verify -pubin -inkey "$d/ed.pub" -rawin -in src/sample.c -sigfile "$d/sig"
openssl rsa -in "$d/rsa.pem" -check -noout
openssl prime 170141183460469231731687303715884105727
openssl kdf -keylen 32 -kdfopt digest:SHA256 -kdfopt pass:secret -kdfopt salt:salt -kdfopt iter:20000 PBKDF2
# The figures of `speed` differ; that it gets through each algorithm and prints a line for it must not.
openssl speed -seconds 1 -bytes 16384 sha256 >"$d/speed" 2>/dev/null
openssl speed -seconds 1 -bytes 16384 -evp aes-256-gcm >>"$d/speed" 2>/dev/null
openssl speed -seconds 1 rsa2048 ecdsap256 >>"$d/speed" 2>/dev/null
sed -n -E 's/^(sha256|AES-256-GCM|rsa *2048|rsa  2048 bits|.*ecdsa \(nistp256\)).*[0-9.]+.*$/\1 measured/p' "$d/speed" | tr -s ' '
