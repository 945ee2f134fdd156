//! x
pub trait Backend {}
