# nginx with one worker serves small and larger files to ab over the loopback of a network of its own.
set -e
d=$TMPDIR/nginx
rm -rf "$d"
mkdir -p "$d/html"
head -c 4096 data/text.txt >"$d/html/small.txt"
head -c 65536 data/text.txt >"$d/html/large.txt"
cat >"$d/nginx.conf" <<EOF
daemon on;
user root;
worker_processes 1;
pid $d/nginx.pid;
error_log $d/error.log;
events { worker_connections 256; }
http {
    access_log $d/access.log;
    client_body_temp_path $d/t1; proxy_temp_path $d/t2; fastcgi_temp_path $d/t3; uwsgi_temp_path $d/t4; scgi_temp_path $d/t5;
    default_type text/plain;
    keepalive_requests 100000;
    gzip on;
    gzip_types text/plain;
    server { listen 127.0.0.1:8080; root $d/html; }
}
EOF
export D=$d
unshare --net sh -e -c '
ip link set lo up
nginx -c "$D/nginx.conf" -e "$D/error.log"
trap "nginx -c $D/nginx.conf -e $D/error.log -s stop" EXIT
for run in "-k -n 10000 -c 8 http://127.0.0.1:8080/small.txt" "-n 2000 -c 8 http://127.0.0.1:8080/small.txt" \
    "-k -n 2000 -c 4 http://127.0.0.1:8080/large.txt" "-k -n 300 -c 4 -H Accept-Encoding:gzip http://127.0.0.1:8080/large.txt"; do
    ab -q $run >"$D/ab.out" 2>&1 || { cat "$D/ab.out" >&2; exit 1; }
    grep -E "Complete|Failed|Non-2xx|Document Length|HTML transferred" "$D/ab.out"
done'
wc -l <"$d/access.log"
awk '{print $9}' "$d/access.log" | sort | uniq -c
