# Makes a system of unpacked packages: runs with the new root as its own, in a guest. $PREINST in /.tightrope/preinst are packages whose
# preinst script has something to do; /.tightrope/packages lists what is installed on top, from /.tightrope/repository.
set -e
umask 022
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true DEBCONF_NOWARNINGS=yes
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 TERM=dumb
# Not a running system: services are enabled, not started.
export SYSTEMD_OFFLINE=1

step() {
	read -r up rest </proc/uptime
	echo "@step $up $*"
}

printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
mkdir -p /etc/dpkg/dpkg.cfg.d
echo force-unsafe-io >/etc/dpkg/dpkg.cfg.d/tightrope-build

# The users come first.
for package in base-passwd $(grep -v '^base-passwd$' /.tightrope/preinst); do
	script=/var/lib/dpkg/info/$package.preinst
	[ -x "$script" ] || continue
	DPKG_MAINTSCRIPT_NAME=preinst DPKG_MAINTSCRIPT_PACKAGE=${package%%:*} DPKG_MAINTSCRIPT_ARCH=amd64 \
		DPKG_MAINTSCRIPT_PACKAGE_REFCOUNT=1 DPKG_ADMINDIR=/var/lib/dpkg DPKG_ROOT= "$script" install
done
dpkg --configure -a --force-confdef

if [ -s /.tightrope/packages ]; then
	step "installing $(tr '\n' ' ' </.tightrope/packages)"
	apt="apt-get -q -y -o Dir::Etc::sourcelist=/.tightrope/sources.list -o Dir::Etc::sourceparts=/dev/null -o APT::Sandbox::User=root
		-o Dpkg::Use-Pty=0 -o APT::Install-Recommends=false -o Acquire::Languages=none -o Dir::State::Lists=/run/tightrope-lists
		-o Acquire::AllowInsecureRepositories=true -o APT::Get::AllowUnauthenticated=true"
	mkdir -p /run/tightrope-lists/partial
	$apt update
	$apt install $(cat /.tightrope/packages)
fi

step "settling"
version=$(cat /.tightrope/kernel)
depmod -a "$version"
systemctl enable systemd-networkd.service tightrope-ssh-keys.service
systemctl disable systemd-networkd-wait-online.service 2>/dev/null || true
# A guest is short-lived: what machines do at night would only come in the way of its work.
for timer in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer man-db.timer; do
	[ ! -e "/usr/lib/systemd/system/$timer" ] || systemctl disable "$timer" 2>/dev/null
done
# Each system makes its own.
rm -f /etc/ssh/ssh_host_*
: >/etc/machine-id
rm -f /var/lib/dbus/machine-id
rm -f /usr/sbin/policy-rc.d /etc/dpkg/dpkg.cfg.d/tightrope-build
rm -f /var/cache/apt/*.bin /var/cache/apt/archives/*.deb /var/log/*.log /var/log/apt/* /var/lib/dpkg/*-old
