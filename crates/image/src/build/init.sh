#!/bin/sh
# Process 1 of the guest that makes a disk: /dev/vda is to become the root file system, /dev/vdb is the archive that goes into it.
# Lines that begin with @ tell the host how far it is; all others are for who wants to know why something failed.

export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root LC_ALL=C.UTF-8
mount -a
umask 022

step() {
	read -r up rest </proc/uptime
	echo "@step $up $*"
}
leave() {
	sync
	exec /bin/busybox poweroff -f
}
fail() {
	echo "@failed $*"
	leave
}

modprobe -a -q virtio_pci virtio_blk crc32c_generic ext4
[ -b /dev/vda ] && [ -b /dev/vdb ] || fail "the disks are not there"

step "making the file system"
# The host made the disk anew: what has never been written is zero. No flush needs to be waited for, as nothing but the whole counts.
/usr/sbin/mke2fs -q -F -t ext4 -L debian -m 1 -E assume_storage_prezeroed=1 /dev/vda || fail "mke2fs failed"
mount -t ext4 -o noatime,barrier=0,commit=900 /dev/vda /mnt || fail "the new file system cannot be mounted"

step "unpacking"
tar -x -f /dev/vdb -C /mnt || fail "the packages could not be unpacked"
for fs in proc sys dev; do
	mount -o bind /$fs /mnt/$fs
done
mount -t tmpfs run /mnt/run
mount -t tmpfs tmp /mnt/tmp

# Packages that need one of these before the one that brings it has been configured.
[ -e /mnt/usr/bin/sh ] || ln -s dash /mnt/usr/bin/sh
[ -e /mnt/usr/bin/awk ] || ln -s mawk /mnt/usr/bin/awk

step "configuring"
chroot /mnt /bin/sh /.tightrope/configure || fail "the packages could not be configured"

step "finishing"
rm -rf /mnt/.tightrope
umount /mnt/tmp
umount /mnt/run
for fs in dev sys proc; do
	umount /mnt/$fs
done
sync
# What was written and removed again need not lie on the host's disk.
fstrim /mnt
umount /mnt || mount -o remount,ro /mnt || fail "the new file system cannot be unmounted"
step "done"
echo "@done"
leave
