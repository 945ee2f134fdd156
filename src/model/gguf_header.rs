//! The bytes before a GGUF file's tensor data, checked before candle reads them.
//!
//! Candle's reader trusts a few numbers (an alignment of 0 divides by zero, an array of bytes becomes 24 times as
//! large in memory, arrays nest). This scan walks the same structure without building anything, so that every count
//! is bounded by the bytes that are really there, and it alone decides where a file is cut off.
//!
//! ```text
//! magic u32 | version u32 | n_tensors u64 | n_metadata u64
//! n_metadata x: key string | type u32 | value        string = length u64, bytes
//! n_tensors x:  name string | n_dims u32 | n_dims x u64 | type u32 | offset u64
//! ```

use std::io::Read;
use std::path::Path;

use super::ModelError;

/// Largest header: three times that of a vocabulary of 256 thousand tokens.
const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Largest string; chat templates have tens of kilobytes.
const STRING_BYTES_MAX: u64 = 1 << 20;
/// Elements of all arrays together; four arrays of 256 thousand tokens have a quarter of it.
const ARRAY_ELEMENTS_MAX: u64 = 4 << 20;
/// Metadata entries, and tensors; a model of 126 layers has 1138 tensors.
const ENTRIES_MAX: u64 = 1 << 16;
/// Dimensions of a tensor.
const DIMS_MAX: u32 = 4;

const TYPE_U32: u32 = 4;
const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;

/// A header that candle can read safely.
pub(super) struct Header {
    /// All bytes before the tensor data.
    pub(super) bytes: Vec<u8>,
    /// Metadata entries declared.
    pub(super) n_metadata: u64,
    /// Tensors declared.
    pub(super) n_tensors: u64,
}

/// Reads and checks the header of a file of `file_bytes` bytes; `path` is for messages.
pub(super) fn scan(reader: impl Read, file_bytes: u64, path: &Path) -> Result<Header, ModelError> {
    let mut scan = Scan { reader, path, bytes: Vec::new(), file_bytes, array_elements: 0 };
    let magic = scan.u32("the magic number")?;
    if magic != u32::from_le_bytes(*b"GGUF") {
        return Err(ModelError::Malformed(format!("it starts with 0x{magic:08x}, not with 'GGUF'")));
    }
    let version = scan.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(ModelError::Unsupported(format!("GGUF version {version}; versions 2 and 3 can be read")));
    }
    let n_tensors = scan.u64("the number of tensors")?;
    let n_metadata = scan.u64("the number of metadata entries")?;
    for (name, count) in [("tensors", n_tensors), ("metadata entries", n_metadata)] {
        if count > ENTRIES_MAX {
            return Err(ModelError::Malformed(format!("it declares {count} {name}; at most {ENTRIES_MAX} are read")));
        }
    }
    for _ in 0..n_metadata {
        scan.metadata_entry()?;
    }
    for _ in 0..n_tensors {
        scan.tensor_info()?;
    }
    Ok(Header { bytes: scan.bytes, n_metadata, n_tensors })
}

struct Scan<'a, R> {
    reader: R,
    path: &'a Path,
    bytes: Vec<u8>,
    file_bytes: u64,
    array_elements: u64,
}

impl<R: Read> Scan<'_, R> {
    /// Reads `needed` more bytes and returns where they start.
    fn take(&mut self, needed: u64, what: &str) -> Result<usize, ModelError> {
        let offset = self.bytes.len();
        let end = (offset as u64).saturating_add(needed);
        if end > self.file_bytes {
            return Err(self.truncated(needed, what));
        }
        if end > HEADER_BYTES_MAX {
            return Err(ModelError::Malformed(format!("its header is larger than {HEADER_BYTES_MAX} bytes")));
        }
        let got = self.reader.by_ref().take(needed).read_to_end(&mut self.bytes);
        match got {
            Ok(got) if got as u64 == needed => Ok(offset),
            // The file shrank since its length was asked for.
            Ok(_) => Err(self.truncated(needed, what)),
            Err(source) => Err(ModelError::Io { path: self.path.to_owned(), source }),
        }
    }

    fn truncated(&self, needed: u64, what: &str) -> ModelError {
        let (offset, file_bytes) = (self.bytes.len() as u64, self.file_bytes);
        ModelError::Truncated { what: what.to_owned(), needed, offset, file_bytes }
    }

    fn word<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        let start = self.take(N as u64, what)?;
        let mut word = [0; N];
        word.copy_from_slice(&self.bytes[start..]);
        Ok(word)
    }

    fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        self.word(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        self.word(what).map(u64::from_le_bytes)
    }

    /// Passes a string and returns where its bytes start.
    fn string(&mut self, what: &str) -> Result<usize, ModelError> {
        let length = self.u64(what)?;
        if length > STRING_BYTES_MAX {
            let place = self.bytes.len();
            return Err(ModelError::Malformed(format!(
                "{what} at offset {place} has {length} bytes; at most {STRING_BYTES_MAX} are read"
            )));
        }
        self.take(length, what)
    }

    /// A key or a name: text without NUL bytes, of which candle would drop those at the end.
    fn name(&mut self, what: &str) -> Result<String, ModelError> {
        let start = self.string(what)?;
        match std::str::from_utf8(&self.bytes[start..]) {
            Ok(name) if !name.contains(|c: char| c.is_control()) => Ok(name.to_owned()),
            _ => Err(ModelError::Malformed(format!("{what} at offset {start} is not printable text"))),
        }
    }

    fn metadata_entry(&mut self) -> Result<(), ModelError> {
        let key = self.name("a metadata key")?;
        let value_type = self.u32(&key)?;
        if key == "general.alignment" {
            if value_type != TYPE_U32 {
                return Err(ModelError::Malformed(format!("{key} has value type {value_type}, not {TYPE_U32}")));
            }
            let alignment = self.u32(&key)?;
            if !alignment.is_power_of_two() || alignment > 1 << 20 {
                return Err(ModelError::Malformed(format!("{key} is {alignment}, not a power of two up to 2^20")));
            }
            return Ok(());
        }
        match value_type {
            TYPE_STRING => self.string(&key).map(drop),
            TYPE_ARRAY => self.array(&key),
            scalar => self.take(scalar_bytes(scalar, &key)?, &key).map(drop),
        }
    }

    fn array(&mut self, key: &str) -> Result<(), ModelError> {
        let element_type = self.u32(key)?;
        let length = self.u64(key)?;
        self.array_elements = self.array_elements.saturating_add(length);
        if self.array_elements > ARRAY_ELEMENTS_MAX {
            return Err(ModelError::Malformed(format!(
                "{key} has {length} elements; at most {ARRAY_ELEMENTS_MAX} are read in all arrays together"
            )));
        }
        match element_type {
            TYPE_ARRAY => Err(ModelError::Unsupported(format!("{key} is an array of arrays"))),
            TYPE_STRING => (0..length).try_for_each(|_| self.string(key).map(drop)),
            scalar => self.take(length.saturating_mul(scalar_bytes(scalar, key)?), key).map(drop),
        }
    }

    fn tensor_info(&mut self) -> Result<(), ModelError> {
        let name = self.name("a tensor name")?;
        let n_dims = self.u32(&name)?;
        if n_dims == 0 || n_dims > DIMS_MAX {
            return Err(ModelError::Malformed(format!("{name} has {n_dims} dimensions; expected 1 to {DIMS_MAX}")));
        }
        for _ in 0..n_dims {
            let dim = self.u64(&name)?;
            if dim == 0 || dim > 1 << 32 {
                return Err(ModelError::Malformed(format!("{name} has a dimension of {dim}; expected 1 to 2^32")));
            }
        }
        self.take(4 + 8, &name).map(drop)
    }
}

/// Bytes of a value that is neither a string nor an array.
fn scalar_bytes(value_type: u32, key: &str) -> Result<u64, ModelError> {
    match value_type {
        0 | 1 | 7 => Ok(1),
        2 | 3 => Ok(2),
        4..=6 => Ok(4),
        10..=12 => Ok(8),
        _ => Err(ModelError::Malformed(format!("{key} has the unknown value type {value_type}"))),
    }
}
