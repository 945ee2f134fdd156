//! Caches in files: those that host memory has no room for, and sessions that outlive the process.
//!
//! ```text
//! pages_file     pages of one cache, as they are, while a session is away; gone with the process
//! session_file   one session: its tokens, what its cache holds and its pages, checked when it is opened
//! ```
//!
//! Both keep the bytes of pages in the order of [`PageTable::page_ids`](crate::pool::page_table::PageTable::page_ids), so a
//! session that comes back from a file has the cache that it had, bit by bit.

pub mod pages_file;
pub mod session_file;

pub use pages_file::PagesFile;
pub use session_file::{SavedSession, SessionFile, SessionFileError};
