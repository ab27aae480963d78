#!/bin/sh
# The network of Tightrope's default guest. Without an argument: brings it up, which takes a while; process 1 runs it so beside the
# shell. `network wait` waits until that is done. udhcpc calls it with what has happened and variables that say the rest.

case $1 in
wait)
	tries=0
	until [ -e /run/network ] || [ $tries -ge 200 ]; do
		tries=$((tries + 1))
		usleep 50000
	done
	[ -e /run/network ]
	;;
deconfig)
	ifconfig "$interface" 0.0.0.0
	;;
bound | renew)
	ifconfig "$interface" "$ip" netmask "${subnet:-255.255.255.0}" mtu "${mtu:-1500}"
	for gateway in $router; do
		route add default gw "$gateway" dev "$interface" && break
	done
	{
		[ "$domain" ] && echo "search $domain"
		for server in $dns; do
			echo "nameserver $server"
		done
	} >/etc/resolv.conf
	: >/run/network
	;;
'')
	renice -n 19 -p $$
	ifconfig lo up
	modprobe -q virtio_net
	for path in /sys/class/net/*; do
		interface=${path##*/}
		[ "$interface" = lo ] && continue
		[ -d "$path" ] && ifconfig "$interface" up && udhcpc -q -b -A 3 -T 1 -i "$interface" -s "$0"
	done
	;;
esac
