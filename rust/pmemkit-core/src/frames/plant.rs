//! Faults that tests plant, to show that the checkers see them. A normal build carries the names
//! and never acts on them.

/// One mistake an allocator could make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[allow(dead_code)] // Tests make them.
pub enum Plant {
    /// None: the allocator as it is.
    #[default]
    None,
    /// The bits of a frame are set before the area counts it.
    BitsBeforeCount,
    /// An area is looked at and then taken as one, in two steps.
    LookThenTake,
    /// A thread does not look whether its slot is closed.
    NoLookAtTheDoor,
    /// Nobody waits until a thread has left its slot.
    NoWaitAtTheDoor,
    /// What was put back and what was taken go to media in one step.
    FreesWithTakes,
    /// The head of a run goes to media before what continues it.
    HeadFirst,
    /// What continues a run that was put back is erased with its head.
    TailWithHead,
    /// A run that took the place of another is not told from it.
    SameHead,
    /// Lines are stored and not written back.
    LinesStayInCache,
    /// The signature is on media before the map behind it is empty.
    SignatureFirst,
    /// Recovery leaves what continues no run where it is.
    OrphansStay,
    /// A flush forgets the last line that changed.
    LastLineForgotten,
}

#[cfg(test)]
impl Plant {
    /// What crash exploration has to find.
    pub const ON_MEDIA: [Plant; 8] = [
        Plant::FreesWithTakes,
        Plant::HeadFirst,
        Plant::TailWithHead,
        Plant::SameHead,
        Plant::LinesStayInCache,
        Plant::SignatureFirst,
        Plant::OrphansStay,
        Plant::LastLineForgotten,
    ];
}
