//! The XSAVE area of a signal frame: written with the words libc looks for, and checked before
//! anything of it may reach the host.
//!
//! Standard format (Intel SDM volume 1, section 13.4): 512 bytes of FXSAVE, a header of 64, then
//! the components. Linux keeps `struct _fpx_sw_bytes` in the 48 bytes of the FXSAVE part that the
//! processor leaves alone, and a second magic number behind the area (`asm/sigcontext.h`).

use std::arch::x86_64::__cpuid_count;
use std::ops::Range;
use std::sync::OnceLock;

/// Bytes of the FXSAVE part.
pub const LEGACY: usize = 512;
/// Bytes of the FXSAVE part and the header.
pub const WITH_HEADER: usize = 576;

const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
/// Bytes of the second magic number.
pub const MAGIC2_SIZE: usize = 4;

const FCW: Range<usize> = 0..2;
const MXCSR: Range<usize> = 24..28;
const MXCSR_MASK: Range<usize> = 28..32;
const XMM: Range<usize> = 160..416;
const SW: Range<usize> = 464..512;
const XSTATE_BV: Range<usize> = 512..520;
const XCOMP_BV: Range<usize> = 520..528;
const RESERVED: Range<usize> = 528..576;

const FP: u64 = 1;
const SSE: u64 = 2;
const INITIAL_FCW: u16 = 0x037f;
const INITIAL_MXCSR: u32 = 0x1f80;
/// What the SDM says when the processor reports no mask.
const DEFAULT_MXCSR_MASK: u32 = 0xffbf;

/// What every processor with AVX, and every one of AMD's with 64 bits, lets MXCSR have.
const EVERY_MXCSR_MASK: u32 = 0xffff;

/// The frame's area cannot be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadXsave;

fn u64_at(bytes: &[u8], at: Range<usize>) -> u64 {
    u64::from_le_bytes(bytes[at].try_into().expect("eight bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Bytes of an area with the components of `xcr0`, at most `whole`: hosts keep room for more.
#[must_use]
pub fn size_of_components(xcr0: u64, whole: usize) -> usize {
    static ENDS: OnceLock<[usize; 63]> = OnceLock::new();
    // CPUID leaf 0DH, subleaf n: size and offset of component n (SDM volume 1, section 13.2).
    // Asked once: in a virtual machine every CPUID is an exit.
    let ends = ENDS.get_or_init(|| {
        let mut ends = [WITH_HEADER; 63];
        for (n, end) in ends.iter_mut().enumerate().skip(2) {
            let component = __cpuid_count(0xd, n as u32);
            if component.eax != 0 {
                *end = (component.eax + component.ebx) as usize;
            }
        }
        ends
    });
    let present = ends
        .iter()
        .enumerate()
        .filter(|&(n, _)| xcr0 & (1 << n) != 0);
    present
        .map(|(_, &end)| end)
        .max()
        .unwrap_or(WITH_HEADER)
        .clamp(WITH_HEADER, whole.max(WITH_HEADER))
}

/// The area as it goes into a frame: the first `size` bytes of `area` with the software bytes and
/// the second magic number behind it. `xcr0` are the components the guest has; what else the host
/// put into the area (a protection key register the guest was not offered) is left out.
#[must_use]
pub fn export(area: &[u8], size: usize, xcr0: u64) -> Vec<u8> {
    let mut out = area.to_vec();
    out.resize(size.max(WITH_HEADER), 0);
    let present = u64_at(&out, XSTATE_BV);
    if present & FP == 0 {
        out[..MXCSR.start].fill(0);
        out[32..XMM.start].fill(0);
        out[FCW].copy_from_slice(&INITIAL_FCW.to_le_bytes());
    }
    if present & SSE == 0 {
        out[XMM].fill(0);
        out[MXCSR].copy_from_slice(&INITIAL_MXCSR.to_le_bytes());
    }
    out[XSTATE_BV].copy_from_slice(&(present & xcr0 | FP | SSE).to_le_bytes());
    let size = out.len() as u32;
    let sw = &mut out[SW];
    sw.fill(0);
    sw[0..4].copy_from_slice(&FP_XSTATE_MAGIC1.to_le_bytes());
    sw[4..8].copy_from_slice(&(size + MAGIC2_SIZE as u32).to_le_bytes());
    sw[8..16].copy_from_slice(&xcr0.to_le_bytes());
    sw[16..20].copy_from_slice(&size.to_le_bytes());
    out.extend_from_slice(&FP_XSTATE_MAGIC2.to_le_bytes());
    out
}

/// Whether the FXSAVE part says that a whole area of `size` bytes and the second magic number
/// follow. Otherwise only the FXSAVE part counts.
#[must_use]
pub fn is_extended(legacy: &[u8; LEGACY], size: usize) -> bool {
    let sw = &legacy[SW];
    let stated = u32_at(sw, 16) as usize;
    u32_at(sw, 0) == FP_XSTATE_MAGIC1 && stated == size && u32_at(sw, 4) as usize >= stated
}

/// Whether these are the bytes behind a whole area.
#[must_use]
pub fn is_magic2(bytes: [u8; MAGIC2_SIZE]) -> bool {
    u32::from_le_bytes(bytes) == FP_XSTATE_MAGIC2
}

/// Turns an FXSAVE part alone into an area of `size` bytes: x87 and SSE from it, the rest initial.
#[must_use]
pub fn from_legacy(legacy: &[u8; LEGACY], size: usize) -> Vec<u8> {
    let mut area = vec![0; size.max(WITH_HEADER)];
    area[..LEGACY].copy_from_slice(legacy);
    area[SW].fill(0);
    area[XSTATE_BV].copy_from_slice(&(FP | SSE).to_le_bytes());
    area
}

/// The first `size` bytes of a whole area as XRSTOR takes them in ring 0 for the components of `xcr0` without an exception (Intel SDM
/// volume 1, section 13.8.1), if they can be made so. It loads MXCSR whether the area has the SSE component or not.
#[must_use]
pub fn loadable(area: &[u8], size: usize, xcr0: u64) -> Option<Vec<u8>> {
    let mut plain = area.get(..size.max(WITH_HEADER))?.to_vec();
    restrict(&mut plain, xcr0);
    if u64_at(&plain, XSTATE_BV) & SSE == 0 {
        plain[MXCSR].copy_from_slice(&INITIAL_MXCSR.to_le_bytes());
    }
    let standard = u64_at(&plain, XCOMP_BV) == 0 && plain[RESERVED].iter().all(|&b| b == 0);
    let known = u32_at(&plain, MXCSR.start) & !EVERY_MXCSR_MASK == 0;
    (standard && known).then_some(plain)
}

/// Takes out of a whole area of a virtual CPU what the host put in beside the components of `xcr0`.
pub fn restrict(area: &mut [u8], xcr0: u64) {
    if area.len() >= WITH_HEADER {
        let present = u64_at(area, XSTATE_BV) & xcr0;
        area[XSTATE_BV].copy_from_slice(&present.to_le_bytes());
    }
}

/// Checks a whole area from guest memory and makes it fit to be loaded: `current` is the thread's
/// own, for the processor's MXCSR mask.
///
/// # Errors
/// The header has bits the guest's XCR0 has not, or is not of the standard format.
pub fn import(mut area: Vec<u8>, xcr0: u64, current: &[u8]) -> Result<Vec<u8>, BadXsave> {
    if area.len() < WITH_HEADER {
        return Err(BadXsave);
    }
    let stated = u64_at(&area, SW.start + 8..SW.start + 16);
    let whole = u32_at(&area, SW.start) == FP_XSTATE_MAGIC1;
    let present = u64_at(&area, XSTATE_BV);
    let reserved = area[RESERVED].iter().any(|&b| b != 0);
    if present & !xcr0 != 0 || u64_at(&area, XCOMP_BV) != 0 || reserved {
        return Err(BadXsave);
    }
    let taken = if whole { present & stated } else { present };
    area[XSTATE_BV].copy_from_slice(&taken.to_le_bytes());
    let mask = match current.get(MXCSR_MASK) {
        Some(bytes) if bytes != [0; 4] => u32_at(bytes, 0),
        _ => DEFAULT_MXCSR_MASK,
    };
    let mxcsr = u32_at(&area, MXCSR.start) & mask;
    area[MXCSR].copy_from_slice(&mxcsr.to_le_bytes());
    area[MXCSR_MASK].copy_from_slice(&mask.to_le_bytes());
    area[SW].fill(0);
    Ok(area)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 832;
    const XCR0: u64 = 7;

    fn sample() -> Vec<u8> {
        let mut area: Vec<u8> = (0..SIZE).map(|n| n as u8).collect();
        area[MXCSR].copy_from_slice(&INITIAL_MXCSR.to_le_bytes());
        area[MXCSR_MASK].copy_from_slice(&0xffff_u32.to_le_bytes());
        area[SW].fill(0);
        area[LEGACY..WITH_HEADER].fill(0);
        area[XSTATE_BV].copy_from_slice(&7_u64.to_le_bytes());
        area
    }

    fn exported_area() -> Vec<u8> {
        let mut out = export(&sample(), SIZE, XCR0);
        out.truncate(SIZE);
        out
    }

    #[test]
    fn exported_area_comes_back_unchanged() {
        let out = export(&sample(), SIZE, XCR0);
        let legacy: [u8; LEGACY] = out[..LEGACY].try_into().unwrap();
        assert!(is_extended(&legacy, SIZE));
        assert!(is_magic2(out[SIZE..].try_into().unwrap()));
        assert_eq!(import(exported_area(), XCR0, &sample()), Ok(sample()));
    }

    #[test]
    fn component_the_guest_was_not_offered_is_left_out() {
        let mut area = sample();
        area[XSTATE_BV].copy_from_slice(&(7_u64 | 1 << 9).to_le_bytes());
        assert_eq!(import(area.clone(), XCR0, &sample()), Err(BadXsave));
        restrict(&mut area, XCR0);
        assert_eq!(import(area, XCR0, &sample()), Ok(sample()));
    }

    #[test]
    fn initial_components_are_written_out() {
        let out = export(&[0; SIZE], SIZE, XCR0);
        assert_eq!(u64_at(&out, XSTATE_BV), 3);
        assert_eq!(out[FCW], INITIAL_FCW.to_le_bytes());
        assert_eq!(out[MXCSR], INITIAL_MXCSR.to_le_bytes());
    }

    #[test]
    fn components_only_the_host_has_are_not_exported() {
        let mut area = sample();
        area[XSTATE_BV].copy_from_slice(&(1_u64 << 9 | 7).to_le_bytes());
        let mut out = export(&area, area.len(), XCR0);
        out.truncate(SIZE);
        assert_eq!(u64_at(&out, XSTATE_BV), 7);
        assert_eq!(import(out, XCR0, &sample()), Ok(sample()));
    }

    #[test]
    fn loadable_area_has_nothing_that_raises_an_exception() {
        let mut area = sample();
        area.resize(4096, 0xa5);
        area[XSTATE_BV].copy_from_slice(&(7_u64 | 1 << 9).to_le_bytes());
        let plain = loadable(&area, SIZE, XCR0).expect("it can be made plain");
        assert_eq!(
            plain,
            sample(),
            "a component less, and no more than has a place"
        );
        for (at, bytes) in [
            (XCOMP_BV.start + 7, 0x80),
            (RESERVED.start, 1),
            (575, 1),
            (MXCSR.start + 2, 1),
        ] {
            let mut bad = sample();
            bad[at] = bytes;
            assert_eq!(loadable(&bad, SIZE, XCR0), None, "byte {at}");
        }
        assert_eq!(loadable(&sample()[..SIZE - 1], SIZE, XCR0), None);
        assert_eq!(loadable(&[], 0, XCR0), None);
    }

    #[test]
    fn mxcsr_is_initial_without_its_component() {
        let mut area = sample();
        area[MXCSR].fill(0xff);
        area[XSTATE_BV].copy_from_slice(&1_u64.to_le_bytes());
        let plain = loadable(&area, SIZE, XCR0).expect("it is not looked at");
        assert_eq!(u32_at(&plain, MXCSR.start), INITIAL_MXCSR);
    }

    #[test]
    fn unknown_component_is_refused() {
        let mut area = exported_area();
        area[XSTATE_BV].copy_from_slice(&(1_u64 << 18 | 7).to_le_bytes());
        assert_eq!(import(area, XCR0, &sample()), Err(BadXsave));
    }

    #[test]
    fn compacted_format_is_refused() {
        let mut area = exported_area();
        area[XCOMP_BV].copy_from_slice(&(1_u64 << 63).to_le_bytes());
        assert_eq!(import(area, XCR0, &sample()), Err(BadXsave));
    }

    #[test]
    fn reserved_header_bytes_are_refused() {
        let mut area = exported_area();
        area[575] = 1;
        assert_eq!(import(area, XCR0, &sample()), Err(BadXsave));
    }

    #[test]
    fn reserved_mxcsr_bits_are_cleared() {
        let mut area = exported_area();
        area[MXCSR].fill(0xff);
        let area = import(area, XCR0, &sample()).unwrap();
        assert_eq!(area[MXCSR], 0xffff_u32.to_le_bytes());
    }

    #[test]
    fn components_the_frame_does_not_claim_become_initial() {
        let mut area = exported_area();
        area[SW.start + 8..SW.start + 16].copy_from_slice(&3_u64.to_le_bytes());
        assert_eq!(
            u64_at(&import(area, XCR0, &sample()).unwrap(), XSTATE_BV),
            3
        );
    }

    #[test]
    fn size_is_bounded_by_the_hosts_area() {
        assert_eq!(size_of_components(3, 4096), WITH_HEADER);
        assert_eq!(size_of_components(u64::MAX, 700), 700);
        assert_eq!(size_of_components(7, 0), WITH_HEADER);
    }

    #[test]
    fn short_area_is_refused() {
        assert_eq!(import(vec![0; 512], XCR0, &sample()), Err(BadXsave));
    }
}
