#!/bin/sh
# disk.sh - what a guest's disk costs: interrupts and exits of the same requests under one or several builds of vmm. Runs in the
# emulated machine: tests/rig -n --timeout 1500 --guest /guest -- sh tests/benches/disk.sh VMM...
# The counts depend on who of guest and VMM gets the processor first; compare several runs.
set -eu
guest=/guest
counters='exits mmio_exits irq_injections halt_exits'
[ -d /sys/kernel/debug/kvm ] || mount -t debugfs debug /sys/kernel/debug

wait_for() { # TEXT
  for _ in $(seq 1500); do grep -q "$1" out && return; sleep 0.2; done
  echo "disk.sh: the guest does not say $1" >&2; tail out errors >&2; exit 1
}
ask() { # COMMANDS, and waits until they are done
  number=$((number + 1))
  echo "$1; echo done\"$number\"." >&9; wait_for "done$number\."
}
kvm_counts() { for name in $counters; do cat /sys/kernel/debug/kvm/"$vmm"-*/"$name"; done | tr '\n' ' '; }
guest_counts() { # interrupts of the disk, requests
  ask 'echo "interrupts=$(grep virtio0 /proc/interrupts | tr -s " " | cut -d " " -f 3-4 | sed "s/IO-APIC//") requests=$(tr -s " " < /sys/block/vda/stat | cut -d " " -f 2,6)"'
  tr -d '\r' < out | grep -a '^interrupts=' | tail -n 1
}
phase() { # NAME COMMANDS
  echo "  $1"
  guest_counts > before; before=$(kvm_counts)
  ask "$2"
  after=$(kvm_counts); guest_counts > after
  echo "    guest: $(cat before) -> $(cat after)"
  echo "    $counters: $before-> $after"
}
measure() { # VMM CPUS
  work=$(mktemp -d); cd "$work"; number=0
  dd if=/dev/urandom of=disk bs=1M count=32 2> /dev/null
  mkfifo in
  "$1" boot --kernel $guest/vmlinuz --initrd $guest/initrd --memory 256M --cpus "$2" --timeout 300 --disk disk \
    --cmdline 'console=hvc0 panic=-1 quiet' --console virtio:stdio < in > out 2> errors &
  vmm=$!
  exec 9> in
  ask 'stty -echo; PS1='
  echo "$1, $2 processors"
  phase '8 readers of 250 requests, one after the other each' \
    'for i in 0 1 2 3 4 5 6 7; do dd if=/dev/vda of=/dev/null bs=4k iflag=direct skip=$((i * 1000)) count=250 2> /dev/null & done; wait'
  phase '60 batches of 32 reads' \
    'echo 4 > /sys/block/vda/queue/max_sectors_kb; dd if=/dev/vda of=/dev/null bs=128k iflag=direct count=60 2> /dev/null'
  phase '60 batches of 32 writes' 'dd if=/dev/zero of=/dev/vda bs=128k oflag=direct count=60 2> /dev/null'
  echo 'poweroff -f' >&9; exec 9>&-; wait $vmm
  cd /; rm -rf "$work"
}
for cpus in 1 2; do
  for each in "$@"; do measure "$each" $cpus; done
done
