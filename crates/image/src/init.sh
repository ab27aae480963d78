#!/bin/sh
# Process 1 of Tightrope's default guest. BusyBox runs it, so most commands below are forks of this
# very shell or built into it. Every process and every module costs time before the prompt: few of both.

export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root

# What /etc/fstab lists: /proc, /sys, /dev, /tmp.
mount -a

# BusyBox's poweroff, halt and reboot tell process 1 by these signals.
stop() {
	trap '' USR1 USR2 TERM
	kill -9 -1
	umount -a -r 2>/dev/null
	exec /bin/busybox "$1" -f
}
trap 'stop halt' USR1
trap 'stop poweroff' USR2
trap 'stop reboot' TERM

echo tightrope >/proc/sys/kernel/hostname
# From here on the kernel may ask for modules itself (file systems, say); before, it would only lose time.
echo /bin/modprobe >/proc/sys/kernel/modprobe

# The drivers of the virtio devices that are there (virtio 1.3, 4.1.2; transitional ids below 0x1040).
modules= network=
for device in /sys/bus/pci/devices/*; do
	read -r vendor <"$device/vendor"
	case $vendor in 0x1af4 | 0x8086) ;; *) continue ;; esac
	read -r id <"$device/device"
	case $id in
	0x25ab) modules="$modules i6300esb" ;; # a watchdog
	0x1041 | 0x1000) network=yes ;; # later: nobody waits for it
	0x1042 | 0x1001) modules="$modules virtio_blk" ;;
	0x1043 | 0x1003) modules="$modules virtio_console" ;;
	0x1044 | 0x1005) modules="$modules virtio_rng" ;;
	0x1045 | 0x1002) modules="$modules virtio_balloon" ;;
	0x1048 | 0x1004) modules="$modules virtio_scsi" ;;
	0x1053) ;; # the agent's own
	0x105a) modules="$modules virtiofs" ;;
	esac
done
if [ "$modules" ]; then
	[ -d /sys/bus/virtio ] || modules="virtio_pci$modules"
	modprobe -a -q $modules
fi

set -f
read -r cmdline </proc/cmdline
root= fstype= flags= mode=ro init=/sbin/init agent= shares=
for word in $cmdline; do
	case $word in
	root=* | tightrope.root=*) root=${word#*=} ;;
	tightrope.init=agent) agent=yes ;;
	rootfstype=*) fstype=${word#*=} ;;
	rootflags=*) flags=,${word#*=} ;;
	init=*) init=${word#*=} ;;
	tightrope.share=*) shares="$shares ${word#*=}" ;;
	ro | rw) mode=$word ;;
	esac
done
set +f

# Directories of the host, each TAG:DIR or TAG:DIR:ro, below the root $1.
mount_shares() {
	tmp=
	for share in $shares; do
		tag=${share%%:*} dir=${share#*:} option=rw
		case $dir in
		*:ro) dir=${dir%:ro} option=ro ;;
		esac
		# Whoever is process 1 then would mount a /tmp over it, unless there is one.
		case $dir in
		/tmp/*) [ -z "$1" ] || [ "$tmp" ] || { mount -t tmpfs -o nosuid,nodev tmp "$1/tmp" && tmp=made; } ;;
		esac
		mkdir -p "$1$dir" 2>/dev/null
		mount -t virtiofs -o $option "$tag" "$1$dir" ||
			echo "tightrope: cannot mount the shared directory $tag at $dir"
	done
}

# A disk of the user's: make it the root and hand over to its init.
if [ "$root" ]; then
	tries=0
	while :; do
		case $root in
		*=*) disk=$(findfs "$root" 2>/dev/null) ;;
		*) disk=$root ;;
		esac
		[ -b "$disk" ] && break
		tries=$((tries + 1))
		[ $tries -gt 50 ] && break
		usleep 100000
	done
	[ -b "$disk" ] || echo "tightrope: there is no disk $root; is it given with --disk?"
	if [ -b "$disk" ]; then
		if mount -t "${fstype:-ext4}" -o "$mode$flags" "$disk" /mnt ||
			{ [ -z "$fstype" ] && mount -o "$mode$flags" "$disk" /mnt; }; then
			umount /tmp
			# The agent for the host's requests, into the new /run: as a service, or as process 1.
			[ -x /tightrope/agent ] && /tightrope/agent install /mnt && [ "$agent" ] && init=/run/tightrope/agent
			# Behind that, as they may be in the new /run.
			mount_shares /mnt
			for fs in proc sys dev; do
				[ -d /mnt/$fs ] && mount -o move /$fs /mnt/$fs
			done
			# Where every distribution has it; the kernel loads file systems and the like by it.
			echo /sbin/modprobe >/mnt/proc/sys/kernel/modprobe
			exec switch_root /mnt "$init" "$@"
		fi
		echo "tightrope: cannot mount $root as root file system"
	fi
	echo "tightrope: here is a shell instead"
fi

mount_shares ""
read -r active </sys/class/tty/console/active
tty=/dev/${active##* }
[ -c "$tty" ] || tty=/dev/console
[ "$TERM" = linux ] && TERM=vt220
export TERM PS1='\h:\w\$ '
# The terminal's size when the guest was started. Programs would believe these words rather than ask the terminal, whose size changes.
[ "$COLUMNS" ] && [ "$LINES" ] && stty columns "$COLUMNS" rows "$LINES" <"$tty"
unset COLUMNS LINES
read -r release </proc/sys/kernel/osrelease
cd /root
echo "
Debian's Linux $release under Tightrope. To leave: poweroff, exit or Ctrl-D.
" >"$tty"
# The session becomes a new one with this terminal, so that Ctrl-C and job control work.
/sbin/session /bin/sh <"$tty" >"$tty" 2>&1 &
shell=$!
[ "$network" ] && /sbin/network >/dev/null 2>&1 </dev/null &
[ -x /tightrope/agent ] && {
	# The host's first command finds a network that comes soon.
	[ "$network" ] && timeout 3 /sbin/network wait
	while :; do
		/tightrope/agent daemon
		sleep 1
	done
} >/dev/null 2>&1 </dev/null &
wait $shell
stop poweroff
