//! Small ELF files made by hand, for saying exactly what is wrong with them.

/// A loadable segment.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Where in the file.
    pub offset: u64,
    /// Where in memory.
    pub address: u64,
    /// Bytes in the file.
    pub file_size: u64,
    /// Bytes in memory.
    pub memory_size: u64,
    /// PF_X 1, PF_W 2, PF_R 4.
    pub flags: u32,
}

/// An ELF file to be written; as it stands it is a program that exits with status 42.
#[derive(Clone, Debug)]
pub struct Elf {
    /// 1: 32 bits, 2: 64 bits.
    pub class: u8,
    /// 1: little, 2: big endian.
    pub data: u8,
    /// 2: a program, 3: position-independent, 1: an object file, 4: a core dump.
    pub kind: u16,
    /// 62: x86-64.
    pub machine: u16,
    /// First instruction.
    pub entry: u64,
    /// Path of the interpreter.
    pub interpreter: Option<String>,
    /// Segments to load.
    pub segments: Vec<Segment>,
    /// Program headers to announce; without, as many as there are.
    pub header_count: Option<u16>,
    /// Size of a program header to announce.
    pub header_size: u16,
    /// Where the program headers are announced to be.
    pub header_offset: u64,
}

const BASE: u64 = 0x40_0000;
const CODE: u64 = 0x800;

impl Default for Elf {
    fn default() -> Self {
        Self {
            class: 2,
            data: 1,
            kind: 2,
            machine: 62,
            entry: BASE + CODE,
            interpreter: None,
            segments: vec![Segment {
                offset: 0,
                address: BASE,
                file_size: 0x1000,
                memory_size: 0x1000,
                flags: 5,
            }],
            header_count: None,
            header_size: 56,
            header_offset: 64,
        }
    }
}

impl Elf {
    /// The file's bytes: one page.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut file = vec![0; 0x1000];
        let headers: u16 = (self.segments.len() + usize::from(self.interpreter.is_some()))
            .try_into()
            .unwrap_or(u16::MAX);
        let mut head = vec![0x7f, b'E', b'L', b'F', self.class, self.data, 1, 0];
        head.resize(16, 0);
        head.extend(self.kind.to_le_bytes());
        head.extend(self.machine.to_le_bytes());
        head.extend(1_u32.to_le_bytes());
        head.extend(self.entry.to_le_bytes());
        head.extend(self.header_offset.to_le_bytes());
        head.extend([0; 12]); // no sections, no flags
        head.extend(64_u16.to_le_bytes());
        head.extend(self.header_size.to_le_bytes());
        head.extend(self.header_count.unwrap_or(headers).to_le_bytes());
        head.extend([0; 6]);
        if let Some(path) = &self.interpreter {
            let at = 0x600;
            let size = path.len() as u64 + 1;
            file[at..at + path.len()].copy_from_slice(path.as_bytes());
            let segment = Segment {
                offset: at as u64,
                address: BASE + at as u64,
                file_size: size,
                memory_size: size,
                flags: 4,
            };
            head.extend(program_header(3, &segment));
        }
        for segment in &self.segments {
            head.extend(program_header(1, segment));
        }
        file[..head.len()].copy_from_slice(&head);
        // mov edi, 42; mov eax, 231; syscall
        let code = [0xbf, 42, 0, 0, 0, 0xb8, 231, 0, 0, 0, 0x0f, 0x05];
        let at = CODE as usize;
        file[at..at + code.len()].copy_from_slice(&code);
        file
    }

    /// With another segment besides.
    #[must_use]
    pub fn segment(mut self, address: u64, file_size: u64, memory_size: u64, flags: u32) -> Self {
        self.segments.push(Segment {
            offset: 0,
            address,
            file_size,
            memory_size,
            flags,
        });
        self
    }
}

fn program_header(kind: u32, segment: &Segment) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(56);
    bytes.extend(kind.to_le_bytes());
    bytes.extend(segment.flags.to_le_bytes());
    for word in [
        segment.offset,
        segment.address,
        segment.address,
        segment.file_size,
        segment.memory_size,
        0x1000,
    ] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}
