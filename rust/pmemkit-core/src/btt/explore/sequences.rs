//! Which sequences are explored, and in which settings.
//!
//! Invariants:
//! 1. The same settings and sequences, in the same order, on every machine.
//! 2. A sequence stays inside the sectors that an explorer's arena has.
//!
//! What this does not do: carry them out.

use super::{Setting, Step, SECTORS};
use crate::block::Op;
use crate::btt::engine::Options;
use crate::btt::fixture::Dice;
use crate::btt::{Levelling, Victim};
use crate::media::Granularity;

/// A sector size of each class: without and with metadata, and padded.
pub const SIZES: [u32; 5] = [512, 520, 4096, 4104, 4224];

/// The sector that is in error where one is: it shares its word with one that is not.
pub const BAD: u32 = 3;

/// Ranges of sectors: two in one word of the map, both of them, one in another line, and more than
/// there are lanes across two lines.
const RANGES: [(u32, u32); 5] = [(2, 1), (3, 1), (2, 2), (17, 1), (14, 4)];

const OPS: [Op; 3] = [Op::Write, Op::Zero, Op::Discard];

/// Media and how the engine is opened on them.
pub fn media() -> [Setting; 4] {
    let plain = Setting {
        sector_size: 512,
        granularity: Granularity::Cacheline,
        torn_pages: false,
        options: Options::default(),
        warm: false,
        in_error: None,
    };
    let options = Options { strict: true, ..Options::default() };
    let page = Setting { granularity: Granularity::Page, options, ..plain };
    [
        plain,
        Setting { granularity: Granularity::Byte, ..plain },
        page,
        Setting { torn_pages: true, ..page },
    ]
}

/// Every setting: media, sector size, fresh, in use, and with a sector in error.
pub fn settings() -> Vec<Setting> {
    let arenas = [(false, None), (true, None), (true, Some(BAD)), (false, Some(BAD))];
    let each = media().into_iter().flat_map(|setting| {
        SIZES.into_iter().map(move |sector_size| Setting { sector_size, ..setting })
    });
    each.flat_map(|setting| {
        arenas.into_iter().map(move |(warm, in_error)| Setting { warm, in_error, ..setting })
    })
    .collect()
}

/// Settings in which every write moves another sector, too. The seeds are those of victims.
pub fn levelled() -> Vec<Setting> {
    let [plain, byte, page, torn] = media();
    let of = |setting: Setting, sector_size, in_error, seed, victim| {
        let levelling = Some(Levelling { period: 1, victim, seed });
        let options = Options { levelling, ..setting.options };
        Setting { sector_size, in_error, warm: true, options, ..setting }
    };
    vec![
        of(plain, 512, None, 1, Victim::Random),
        of(plain, 4096, Some(BAD), 2, Victim::Random),
        of(plain, 4104, None, 3, Victim::LeastWorn),
        of(byte, 520, Some(BAD), 4, Victim::Random),
        of(page, 4096, None, 5, Victim::Random),
        of(torn, 512, Some(BAD), 6, Victim::Random),
    ]
}

/// Every operation of the sequences of one and two.
pub fn steps() -> Vec<Step> {
    let threads = 0..2;
    let each = threads.flat_map(|thread| OPS.into_iter().map(move |op| (thread, op)));
    each.flat_map(|(thread, op)| {
        RANGES.into_iter().map(move |(first, count)| Step { thread, op, first, count })
    })
    .collect()
}

/// All sequences of one and of two operations.
pub fn short() -> impl Iterator<Item = Vec<Step>> {
    let one = steps().into_iter().map(|step| vec![step]);
    let two =
        steps().into_iter().flat_map(|one| steps().into_iter().map(move |two| vec![one, two]));
    one.chain(two)
}

/// Random sequences of three to eight operations; the same seed, the same sequences.
pub fn random(seed: u64) -> impl Iterator<Item = Vec<Step>> {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    std::iter::from_fn(move || {
        let length = 3 + dice.roll(6);
        let any = |_| {
            let first = dice.roll(u64::from(SECTORS)) as u32;
            let most = u64::from(SECTORS - first).min(if dice.roll(3) == 0 { 8 } else { 1 });
            Step {
                thread: dice.roll(2) as usize,
                op: [Op::Write, Op::Write, Op::Write, Op::Zero, Op::Discard][dice.roll(5) as usize],
                first,
                count: 1 + dice.roll(most) as u32,
            }
        };
        Some((0..length).map(any).collect())
    })
}
