//! A progress bar on stderr, where that is a terminal.

use std::io::IsTerminal as _;

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::service::fsck::Tick;

/// The bar.
pub(super) struct Bar(ProgressBar);

impl Bar {
    /// Hidden if it is not wanted, or if nobody would see it.
    pub(super) fn new(quiet: bool) -> Self {
        let hidden = quiet || !std::io::stderr().is_terminal();
        let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        if let Ok(style) = ProgressStyle::with_template("{msg} [{wide_bar}] {percent}% {elapsed}") {
            bar.set_style(style.progress_chars("=> "));
        }
        Self(bar)
    }

    /// Draws. An object counts as much as a block, so that many small files move it as well as a large one.
    pub(super) fn show(&self, tick: &Tick) {
        const OBJECT: u64 = 4096;
        let work = |checked: &crate::service::fsck::Checked| checked.bytes + OBJECT * checked.objects();
        self.0.set_length(work(&tick.total));
        self.0.set_position(work(&tick.checked).min(work(&tick.total)));
        let (objects, bytes) = (tick.checked.objects(), HumanBytes(tick.checked.bytes));
        self.0.set_message(format!("{}: {objects} objects, {bytes}", tick.doing));
    }

    /// Takes it away.
    pub(super) fn end(&self) {
        self.0.finish_and_clear();
    }
}
