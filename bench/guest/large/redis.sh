# redis and its load generator over the loopback of a network of its own; the numbers of keys and counters are checked.
set -e
d=$TMPDIR/redis
rm -rf "$d"
mkdir -p "$d"
export D=$d
unshare --net sh -e -c '
ip link set lo up
redis-server --port 6379 --bind 127.0.0.1 --save "" --appendonly no --dir "$D" --daemonize yes --logfile "$D/log" --pidfile "$D/pid" >/dev/null
for i in 1 2 3 4 5 6 7 8 9 10; do redis-cli ping >/dev/null 2>&1 && break; sleep 0.1; done
redis-benchmark -q -n 10000 -c 20 -t set,get,incr,lpush,rpop,sadd,hset,zadd >/dev/null
redis-benchmark -q -n 60000 -c 20 -P 16 -t set,get,incr >/dev/null
redis-cli dbsize
redis-cli get counter:__rand_int__
redis-cli llen mylist
redis-cli --raw eval "local s = 0 for i = 1, 20000 do redis.call(\"set\", \"k\" .. i, i) s = s + redis.call(\"get\", \"k\" .. i) end return s" 0
redis-cli dbsize
redis-cli shutdown nosave || :'
