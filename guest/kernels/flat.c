// A kernel of our own for tests of `vmm boot`: it uses nothing but the 64-bit boot entry. The first word
// of its command line says what it does; most of it is hostile, and none of it may do more than end
// its own machine. Ends by turning the machine off, after printing "done".
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

__asm__(".globl _start\n"
        "_start: cli\n"
        "  lea stack_top(%rip), %rsp\n"
        "  mov %rsi, %rdi\n"
        "  call start\n"
        "1: hlt\n"
        "  jmp 1b\n"
        ".bss\n"
        "  .balign 16\n"
        "  .skip 16384\n"
        "stack_top: .text\n"
        // A fault: skips two bytes, the length of RDMSR, WRMSR and UD2, and counts.
        "fault_with_code: add $8, %rsp\n"
        "fault: addq $2, (%rsp)\n"
        "  incl faults(%rip)\n"
        "  iretq\n");

extern char fault[], fault_with_code[];
volatile u32 faults;

static void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static void out16(u16 port, u16 value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static u8 in8(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static u16 in16(u16 port) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static u32 in32(u16 port) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }

static void say(const char *text) { for (; *text; text++) out8(0x3f8, *text); }
static void off(void) { say("done\n"); out8(0x600, 0x34); for (;;) __asm__ volatile("hlt"); }

static void say_hex(u32 value) {
  for (int i = 28; i >= 0; i -= 4) out8(0x3f8, "0123456789abcdef"[value >> i & 15]);
  say("\n");
}

static u64 state = 88172645463325252ull;
static u64 random(void) {
  state ^= state << 13; state ^= state >> 7; state ^= state << 17;
  return state;
}

struct gate { u16 low, selector; u8 ist, type; u16 middle; u32 high, zero; } __attribute__((packed));
static struct gate idt[32];
static void catch_faults(void) {
  struct { u16 limit; u64 base; } __attribute__((packed)) table = {sizeof idt - 1, (u64)idt};
  for (int i = 0; i < 32; i++) {
    int code = i == 8 || (i >= 10 && i <= 14) || i == 17 || i == 21;
    u64 at = (u64)(code ? fault_with_code : fault);
    idt[i] = (struct gate){at, 0x10, 0, 0x8e, at >> 16, at >> 32, 0};
  }
  __asm__ volatile("lidt %0" ::"m"(table));
}

// Ports whose writes end the machine are left out, so that the rest is tried.
static int ends(u16 port) {
  return (port >= 0x5fd && port <= 0x601) || (port >= 0xcf6 && port <= 0xcf9) || (port >= 0x61 && port <= 0x64) ||
         (port >= 0x502 && port <= 0x505);
}

// Ports: everywhere, and more often where the devices are.
static void ports(u32 rounds) {
  static const u16 likely[] = {0x3f8, 0x60, 0x64, 0xcf9, 0x600, 0x505, 0x20, 0xa0, 0x40};
  for (u32 i = 0; i < rounds; i++) {
    u64 r = random();
    u16 port = r & 1 ? r >> 8 : likely[(r >> 8) % 9] + (r >> 16 & 7) - 2;
    u32 value = r >> 32;
    int write = !ends(port) && !(port >= 0x3f8 && port <= 0x3ff);
    switch (r >> 1 & 7) {
      case 0: in8(port); break;
      case 1: in16(port); break;
      case 2: in32(port); break;
      case 3: if (write) out8(port, value); break;
      case 4: if (write) out16(port, value); break;
      case 5: if (write) out32(port, value); break;
      case 6: {
        static u8 buffer[64];
        void *to = buffer; u64 count = value % 16;
        __asm__ volatile("rep insl" : "+D"(to), "+c"(count) : "d"(port) : "memory");
        break;
      }
      case 7: // The serial port's registers, but not its data: what is printed is looked at.
        if ((value & 7) != 0) out8(0x3f8 + (value & 7), (value >> 8) & ((value & 7) == 3 ? 0x7f : 0xef));
        break;
    }
  }
  out8(0x3fb, 3); out8(0x3fc, 8);
}

// Addresses that are no memory: where virtio devices are or could be, and elsewhere below 4 GiB.
static void addresses(u32 rounds, u64 start, u64 bytes) {
  for (u32 i = 0; i < rounds; i++) {
    u64 r = random();
    u64 at = start + (r >> 8) % bytes;
    u64 value = random();
    switch (r & 7) {
      case 0: (void)*(volatile u8 *)at; break;
      case 1: (void)*(volatile u16 *)at; break;
      case 2: (void)*(volatile u32 *)at; break;
      case 3: (void)*(volatile u64 *)at; break;
      case 4: *(volatile u8 *)at = value; break;
      case 5: *(volatile u16 *)at = value; break;
      case 6: *(volatile u32 *)(at & ~3ull) = value >> (value & 31); break;
      case 7: *(volatile u64 *)at = value; break;
    }
  }
}

static void msrs(u32 rounds) {
  static const u32 bases[] = {0, 0x10, 0x1a0, 0x200, 0x277, 0x400, 0x800, 0x6e0, 0x4b564d00, 0xc0000080, 0xc0010000, 0x40000000};
  for (u32 i = 0; i < rounds; i++) {
    u64 r = random();
    u32 index = bases[(r >> 8) % 12] + (r >> 16 & 0x1f);
    u32 low = random(), high = random();
    // What would end the machine by itself: the mode, the local APIC's address, the segment bases.
    int dangerous = index == 0xc0000080 || index == 0x1b;
    if (r & 1 || dangerous) __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
    else __asm__ volatile("wrmsr" ::"a"(low), "d"(high), "c"(index));
  }
}

// Registers that the machine does not show, and some that it does: each is read, and written with what was read.
static void denied(void) {
  static const u32 hidden[] = {0xc1, 0x179, 0x38f, 0x400, 0x480, 0x40000000, 0x4b564d02, 0xc0010000, 0xc0010117};
  static const u32 shown[] = {0x10, 0x277, 0x2ff, 0xc0000100};
  u32 before = 0;
  for (u32 i = 0; i < 9; i++) {
    u32 low = 0, high = 0;
    before = faults;
    __asm__ volatile("rdmsr" : "+a"(low), "+d"(high) : "c"(hidden[i]));
    if (faults == before) { say("read: "); say_hex(hidden[i]); }
    before = faults;
    __asm__ volatile("wrmsr" ::"a"(low), "d"(high), "c"(hidden[i]));
    if (faults == before) { say("written: "); say_hex(hidden[i]); }
  }
  before = faults;
  for (u32 i = 0; i < 4; i++) {
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(shown[i]));
    __asm__ volatile("wrmsr" ::"a"(low), "d"(high), "c"(shown[i]));
  }
  say(faults == before ? "the others are answered\n" : "another one is refused\n");
}

// A virtio driver that means harm: the device is set up properly, then its queue is filled with anything.
#define REGISTER(base, at) (*(volatile u32 *)((base) + (at)))
struct descriptor { u64 address; u32 length; u16 flags, next; };
static struct descriptor descriptors[64] __attribute__((aligned(4096)));
static struct { u16 flags, index, ring[64], event; } available __attribute__((aligned(4096)));
static struct { u16 flags, index; u64 ring[64]; u16 event; } used __attribute__((aligned(4096)));
static u8 data[1024] __attribute__((aligned(4096)));

static u64 answered;

static u64 any_address(void) {
  u64 r = random();
  switch (r & 7) {
    case 0: return random();
    case 1: return 0xc0000000 + (r >> 40);              // the hole
    case 2: return 16 * 1024 * 1024 - (r >> 8) % 512;   // the end of memory
    case 3: return (u64)&descriptors + (r >> 8) % 4096; // the queue itself
    case 4: return (u64)&used + (r >> 8) % 512;
    default: return (u64)data + (r >> 8) % sizeof data;
  }
}

static void queue_round(u64 base) {
  u32 size = 1u << (random() % 7);
  REGISTER(base, 0x70) = 0;
  REGISTER(base, 0x70) = 3;
  for (u32 page = 0; page < 2; page++) {
    REGISTER(base, 0x14) = page;
    REGISTER(base, 0x24) = page;
    REGISTER(base, 0x20) = REGISTER(base, 0x10) & (page ? ~0u : (u32)random() | (u32)random());
  }
  REGISTER(base, 0x70) = 11;
  REGISTER(base, 0x30) = 0;
  REGISTER(base, 0x38) = random() & 15 ? size : random();
  u64 places[3] = {(u64)descriptors, (u64)&available, (u64)&used};
  for (int i = 0; i < 3; i++) {
    u64 at = random() & 31 ? places[i] : any_address();
    REGISTER(base, 0x80 + i * 16) = at;
    REGISTER(base, 0x84 + i * 16) = at >> 32;
  }
  for (u32 i = 0; i < 64; i++) {
    u64 r = random();
    descriptors[i] = (struct descriptor){any_address(), r & 3 ? (r >> 8) % 8192 : r >> 32, r >> 16 & 7,
                                         r & 64 ? i + 1 : r >> 24 & 127};
    available.ring[i] = r & 128 ? i : r >> 40 & 127;
  }
  // A header that a disk takes.
  for (u32 i = 0; i < sizeof data; i += 16) {
    *(u32 *)(data + i) = random() % 16;
    *(u64 *)(data + i + 8) = random() % 64;
  }
  used.index = 0;
  available.index = random() & 3 ? random() % (size + 1) : random();
  REGISTER(base, 0x44) = 1;
  REGISTER(base, 0x70) = 15;
  for (int i = 0; i < 3; i++) {
    REGISTER(base, 0x50) = random() & 7 ? 0 : random();
    available.index += random() % 3;
    descriptors[random() % 64].address = any_address();
  }
  // Some time for the device's thread.
  for (int i = 0; i < 5 && *(volatile u16 *)&used.index == 0; i++) (void)REGISTER(base, 0x70);
  answered += *(volatile u16 *)&used.index;
  REGISTER(base, 0x64) = 3;
}

static void queues(u32 rounds) {
  for (u32 i = 0; i < rounds; i++) queue_round(0xd0000000 + (random() & 1) * 0x1000);
  REGISTER(0xd0000000ul, 0x70) = 0;
  REGISTER(0xd0001000ul, 0x70) = 0;
}

// The initrd: its length, and a sum over a word of each of its pages and all words of the last, what is behind its end
// included. (Where KVM emulates ring 0, a word takes some 80 us.)
static void initrd(const u8 *zero_page) {
  const u64 *words = (const u64 *)(u64) * (u32 *)(zero_page + 0x218);
  u32 bytes = *(u32 *)(zero_page + 0x21c);
  u64 sum = 0;
  for (u32 left = (bytes + 4095ul) / 4096; left; left--, words += 512)
    for (u32 i = left == 1 ? 0 : left % 512; i < (left == 1 ? 512 : left % 512 + 1); i++) sum = (sum ^ words[i]) * 0x100000001b3ul;
  say_hex(bytes); say_hex(sum >> 32); say_hex(sum);
}

static int is(const char *line, const char *word) {
  while (*word) if (*line++ != *word++) return 0;
  return *line == 0 || *line == ' ';
}

void start(u8 *zero_page) {
  const char *line = (const char *)(u64) * (u32 *)(zero_page + 0x228);
  if (is(line, "hello")) say("hello\n");
  else if (is(line, "line")) { say(line); say("\n"); }
  else if (is(line, "initrd")) initrd(zero_page);
  else if (is(line, "reset")) out8(0xcf9, 6);
  else if (is(line, "keyboard")) out8(0x64, 0xfe);
  else if (is(line, "panic")) out8(0x505, 1);
  else if (is(line, "triple")) __asm__ volatile("ud2");
  else if (is(line, "spin")) { say("spinning\n"); for (;;) ; }
  else if (is(line, "halt")) { say("halting\n"); for (;;) __asm__ volatile("hlt"); }
  else if (is(line, "flood")) { for (;;) say("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n"); }
  else if (is(line, "echo")) {
    for (;;) {
      u8 c;
      while (!(in8(0x3fd) & 1)) ;
      c = in8(0x3f8);
      if (c == 'q') break;
      out8(0x3f8, c);
    }
  }
  else if (is(line, "ports")) { catch_faults(); ports(20000); }
  else if (is(line, "addresses")) {
    catch_faults();
    addresses(4000, 0xd0000000, 0x8000);
    addresses(4000, 0xc0000000, 0x3ec00000);
  }
  else if (is(line, "queues")) {
    queues(400);
    say(answered ? "some were answered\n" : "none was answered\n");
  }
  else if (is(line, "denied")) { catch_faults(); denied(); }
  else if (is(line, "msrs")) {
    catch_faults(); msrs(5000);
    say(faults ? "some were refused\n" : "all were taken\n");
  }
  else say("what?\n");
  off();
}
