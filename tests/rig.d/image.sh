# shellcheck shell=bash
# What the machine boots: a Debian cloud kernel, a busybox initramfs (base.cpio) and a small Debian
# userland copied from the host (userland.cpio). Sourced by `rig`; uses its say, die and note.

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
apt_updated=0
apt_update() {
  [ "$apt_updated" = 1 ] && return 0
  apt_updated=1; note "apt-get update"
  as_root apt-get -qq update >> "$cache/apt.log" 2>&1
}
download_deb() {
  ( cd "$cache/debs" && apt-get -qq -o APT::Sandbox::User=root download "$1" ) >> "$cache/apt.log" 2>&1
}
unpack_deb() { # PACKAGE FOLDER: download and unpack it there
  local deb
  mkdir -p "$cache/debs" "$2"; rm -f "$cache/debs/$1"_*.deb
  download_deb "$1" || { apt_update; download_deb "$1"; } || die "cannot download $1 (see $cache/apt.log)"
  deb=$(find "$cache/debs" -name "$1_*.deb" | head -1)
  dpkg-deb -x "$deb" "$2" || die "cannot unpack $deb"
  rm -f "$deb"
}
first_dependency() { apt-cache depends "$1" 2>/dev/null | awk '$1 == "Depends:" { print $2; exit }'; }

# A program from the distribution, when it is not there yet.
need() { # PROGRAM PACKAGE
  command -v "$1" > /dev/null && return 0
  command -v apt-get > /dev/null || die "needs $1, and there is no apt-get to install it with"
  note "installing $2"; apt_update
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
    install "$2" < /dev/null >> "$cache/apt.log" 2>&1 ||
    { tail -n 5 "$cache/apt.log" >&2; die "cannot install $2 (see $cache/apt.log)"; }
}

pack() { ( cd "$1" && find . -mindepth 1 | "$2" cpio -o -H newc -R 0:0 2> /dev/null ); } # FOLDER BUSYBOX

# The folders of a merged-/usr Debian, so that archives can be laid over each other.
skeleton() {
  mkdir -p "$1"/usr/{bin,sbin,lib,lib64} "$1"/{rig,etc,dev,proc,sys,tmp,run,root,home}
  local d; for d in bin sbin lib lib64; do ln -sfn usr/$d "$1/$d"; done
}

build_base() {
  local t=$base.tmp.$$ image version found m
  rm -rf "$t"; mkdir -p "$t"; skeleton "$t/root"; mkdir -p "$t/root/rig/modules"
  image=$(first_dependency linux-image-cloud-amd64)
  [ -n "$image" ] || { apt_update; image=$(first_dependency linux-image-cloud-amd64); }
  [ -n "$image" ] || die "apt knows no linux-image-cloud-amd64: the machine's kernel is Debian's"
  note "fetching $image"
  unpack_deb "$image" "$t/kernel"
  unpack_deb busybox-static "$t/unpacked"
  cp "$t/unpacked/bin/busybox" "$t/busybox"; cp "$t/busybox" "$t/root/rig/busybox"
  mkdir "$t/root/rig/bin"
  for m in $("$t/busybox" --list); do ln -s ../busybox "$t/root/rig/bin/$m"; done
  version=$(ls "$t/kernel/lib/modules")
  cp "$t/kernel/boot/vmlinuz-$version" "$t/vmlinuz"
  for m in virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_console irqbypass ccp kvm kvm-amd; do
    found=$(find "$t/kernel/lib/modules" \( -name "$m.ko" -o -name "$m.ko.xz" \) | head -1)
    case $found in
      *.xz) "$t/busybox" xz -dc < "$found" > "$t/root/rig/modules/$m.ko";;
      *.ko) cp "$found" "$t/root/rig/modules/";;
    esac
  done
  [ -s "$t/root/rig/modules/kvm-amd.ko" ] || die "no kvm-amd module in $image"
  install -m 755 "$here/rig.d/init" "$t/root/init"
  pack "$t/root" "$t/busybox" > "$t/base.cpio" || die "cannot pack the initramfs"
  build_guest "$t/kernel" "$t" guest.cpio
  build_newer_guest "$t"
  rm -rf "$t/kernel" "$t/unpacked" "$t/root"
  echo "$version" > "$t/version"
  rm -rf "$base"; mv "$t" "$base"
  # What other versions of these scripts have left, unless somebody may still use it.
  find "$cache" -mindepth 1 -maxdepth 1 -name 'base-*' -mtime +7 -exec rm -rf {} +
}

# What a guest inside the machine boots: an initramfs with the kernel's virtio modules.
build_guest() { # KERNEL, unpacked; FOLDER, with a busybox; NAME of the initramfs there
  local root=$2/guest m found
  mkdir -p "$root"/{bin,lib,dev,proc,sys}
  cp "$2/busybox" "$root/bin/busybox"
  for m in virtio_ring virtio virtio_mmio virtio_blk virtio-rng virtio_console pvpanic pvpanic-mmio; do
    found=$(find "$1/lib/modules" \( -name "$m.ko" -o -name "$m.ko.xz" \) | head -1)
    case $found in
      *.xz) "$2/busybox" xz -dc < "$found" > "$root/lib/$m.ko";;
      *.ko) cp "$found" "$root/lib/";;
    esac
  done
  install -m 755 "$here/rig.d/guest-init" "$root/init"
  pack "$root" "$2/busybox" > "$2/$3" || die "cannot pack the guest's initramfs"
  rm -rf "$root"
}

# The newer of Debian's kernels, if it has one: only for guests.
build_newer_guest() { # FOLDER, with a busybox
  local image
  image=$(first_dependency linux-image-6.12-cloud-amd64)
  [ -n "$image" ] || { apt_update; image=$(first_dependency linux-image-6.12-cloud-amd64); }
  [ -n "$image" ] || { note "apt knows no linux-image-6.12-cloud-amd64"; return 0; }
  note "fetching $image"
  unpack_deb "$image" "$1/newer"
  cp "$1"/newer/boot/vmlinuz-* "$1/vmlinuz-6.12"
  unpack_kernel "$1/vmlinuz-6.12" "$1/vmlinux-6.12"
  build_guest "$1/newer" "$1" guest-6.12.cpio
  rm -rf "$1/newer"
}

# The ELF file in a kernel that is packed with zstd, where the boot protocol says. A kernel takes seconds to unpack itself
# in the emulated machine.
unpack_kernel() { # VMLINUZ ELF
  local setup at length
  need zstd zstd
  setup=$(od -An -tu1 -j $((0x1f1)) -N1 "$1") at=$(od -An -tu4 -j $((0x248)) -N4 "$1") length=$(od -An -tu4 -j $((0x24c)) -N4 "$1")
  # The last four bytes are its length unpacked.
  dd if="$1" iflag=skip_bytes,count_bytes skip=$(((setup + 1) * 512 + at)) count=$((length - 4)) bs=1M status=none |
    zstd -qdc > "$2" && [ "$(head -c 4 "$2")" = $'\x7fELF' ] ||
    die "cannot unpack $1: is it a kernel packed with zstd?"
}

# Packages of rig.d/userland that the host has, with what they depend on, as "name version" lines.
userland_packages() {
  local wanted
  wanted=$(sed -e 's/#.*//' -e '/^ *$/d' "$here/rig.d/userland")
  # shellcheck disable=SC2086
  dpkg-query -W -f '${db:Status-Abbrev} ${Package} ${Version}\n' $wanted 2> /dev/null | awk '$1 == "ii" { print $2, $3 }'
}

build_userland() { # PACKAGES-FILE
  local t=$1.tmp.$$ list pkg
  list=$t.list
  rm -rf "$t"; skeleton "$t"
  note "copying the userland: $(awk '{ printf "%s ", $1 }' "$1")"
  while read -r pkg _; do dpkg -L "$pkg"; done < "$1" |
    grep -Ev '^/usr/share/(doc|man|info|locale|lintian|bash-completion|bug|doc-base|pixmaps|applications|menu|gcc)(/|$)|/(__pycache__|test|idlelib|ensurepip|config-3[^/]*)(/|$)' |
    sort -u | while read -r f; do if [ -f "$f" ] || [ -L "$f" ]; then echo "$f"; fi; done > "$list"
  # With their folders resolved (/bin is /usr/bin), and the libraries that the programs name.
  while read -r f; do
    printf '%s/%s\n' "$(realpath -m "${f%/*}/")" "${f##*/}"
  done < "$list" | sed 's,^//,/,' | sort -u > "$list.2"
  local libs
  libs=$(grep -E '/s?bin/|\.so' "$list.2" | xargs -r ldd 2> /dev/null |
    awk '$2 == "=>" && $3 ~ /^\// { print $3 } $1 ~ /^\// && $2 ~ /^\(/ { print $1 }' | sort -u)
  for f in $libs; do
    printf '%s/%s\n' "$(realpath -m "${f%/*}/")" "${f##*/}"
    realpath "$f"
  done >> "$list.2"
  sort -u "$list.2" | sed 's,^/,,' | tar -C / --no-recursion --ignore-failed-read -cf - -T - 2>> "$cache/userland.log" |
    tar -C "$t" -xf - --no-same-owner || die "cannot copy the userland"
  for f in sh awk; do
    [ -e "$t/usr/bin/$f" ] || [ ! -e "/usr/bin/$f" ] || cp -L "/usr/bin/$f" "$t/usr/bin/$f"
  done
  # Python's modules as the host has them, compiled: the emulated machine takes seconds for those of one program.
  for f in "$t"/usr/lib/python3.*; do
    [ ! -d "$f" ] || "${f##*/}" -m compileall -q --invalidation-mode unchecked-hash -s "$t" -p / "$f" >> "$cache/userland.log" 2>&1 ||
      note "Python's modules are not compiled (see $cache/userland.log)"
  done
  mkdir -p "$t/etc"
  [ -e "$t/etc/ld.so.cache" ] || cp /etc/ld.so.cache "$t/etc/" 2> /dev/null
  printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n' > "$t/etc/passwd"
  printf 'root:x:0:\nnogroup:x:65534:\n' > "$t/etc/group"
  pack "$t" "$base/busybox" > "$1.cpio.tmp" && mv "$1.cpio.tmp" "$1.cpio"
  rm -rf "$t" "$list" "$list.2"
}

# Fills the cache; sets `base` and `userland` (the archive's path, or nothing).
prepare_images() {
  mkdir -p "$cache" || die "cannot make $cache"
  local stamp packages
  stamp=$(cat "$here"/rig.d/{image.sh,init,guest-init,userland} | sha256sum | head -c 12)
  base=$cache/base-$stamp
  exec 9> "$cache/lock"; flock 9
  need qemu-system-x86_64 qemu-system-x86
  [ -f "$base/version" ] || build_base
  userland=
  if [ "$with_userland" = 1 ]; then
    packages=$(userland_packages)
    userland=$base/userland-$(sha256sum <<< "$packages" | head -c 12)
    [ -f "$userland.cpio" ] || { echo "$packages" > "$userland"; build_userland "$userland"; }
    userland=$userland.cpio
  fi
  flock -u 9; exec 9>&-
}
