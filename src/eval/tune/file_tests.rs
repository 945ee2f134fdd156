use super::*;

fn key(driver: &str, program: &str, tier: &str) -> EntryKey {
    let [adapter, backend, driver, program, tier] = ["A GPU", "vulkan", driver, program, tier].map(str::to_owned);
    EntryKey { adapter, backend, driver, program, tier }
}

fn tuning() -> Tuning {
    let mut tuning = Tuning::default();
    for (class, tile) in [("kivi4/g4-d128", "tiled:64:2:4:8:ahead"), ("f16/g1-d64", "general")] {
        tuning.decode.insert(class.parse().expect("a class"), tile.parse().expect("a tile"));
    }
    tuning.prefill = Some("general".parse().expect("a launch of prefill"));
    tuning.product = Some("few8x8x8x16:8:16:128,many128x128x8:2".parse().expect("a layout"));
    tuning.score = Some("tiled:64:64:4".parse().expect("a tile of score"));
    tuning.gather = Some("lanes:256:4".parse().expect("a launch of gather"));
    tuning
}

fn written() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("caches/concertina/tuning.json");
    let mut file = TuningFile::default();
    file.put(key("mesa 1", "0.1.0", "subgroup"), &tuning());
    file.write(&path).expect("it is written");
    (folder, path)
}

/// What the file says to a device of this key.
fn look_up(path: &Path) -> Result<Found, TuningFileError> {
    let file = TuningFile::read(path)?.expect("there is a file");
    file.find(&key("mesa 1", "0.1.0", "subgroup"), path)
}

#[test]
fn what_was_written_is_read_by_the_same_driver_version_and_tier_alone() {
    let (_folder, path) = written();
    assert_eq!(look_up(&path).expect("it is sound"), Found::Entry(Box::new(tuning())), "round trip");
    let file = TuningFile::read(&path).expect("it is sound").expect("there is a file");
    let found = |key: EntryKey| file.find(&key, &path).expect("it is sound");
    let other = || Found::OtherVersion(key("mesa 1", "0.1.0", "subgroup"));
    assert_eq!(found(key("mesa 2", "0.1.0", "subgroup")), other(), "another driver");
    assert_eq!(found(key("mesa 1", "0.2.0", "subgroup")), other(), "another version");
    assert_eq!(found(key("mesa 1", "0.1.0", "portable")), Found::Nothing, "another tier");
    let adapter = "Another".to_owned();
    assert_eq!(found(EntryKey { adapter, ..key("mesa 1", "0.1.0", "subgroup") }), Found::Nothing, "another adapter");
    assert_eq!(TuningFile::read(&path.with_extension("none")).expect("no error"), None, "no file");
}

#[test]
fn an_entry_takes_the_place_of_its_own_and_of_no_other() {
    let (_folder, path) = written();
    let mut file = TuningFile::read(&path).expect("it is sound").expect("there is a file");
    file.put(key("mesa 2", "0.1.0", "subgroup"), &Tuning::default());
    file.put(key("mesa 2", "0.1.0", "subgroup"), &tuning());
    assert_eq!(file.entries.len(), 2, "one per key");
    file.write(&path).expect("it is written");
    assert_eq!(look_up(&path).expect("it is sound"), Found::Entry(Box::new(tuning())), "the other one stays");
    assert_eq!(fs::read_dir(path.parent().expect("a folder")).expect("readable").count(), 1, "nothing beside it");
}

#[test]
fn every_truncation_is_an_error_that_names_the_file_and_the_way_out() {
    let (_folder, path) = written();
    let whole = fs::read(&path).expect("it was written");
    // The line break at the end may be missing.
    for length in 0..whole.len() - 1 {
        fs::write(&path, &whole[..length]).expect("it is written");
        let error = look_up(&path).expect_err("cut").to_string();
        let says = ["tuning.json", "delete it or run `concertina tune`"].iter().all(|part| error.contains(part));
        assert!(says, "{length} bytes: {error}");
    }
    fs::write(&path, &whole[..whole.len() - 1]).expect("it is written");
    assert!(look_up(&path).is_ok(), "what remains is whole");
}

#[test]
fn wrong_values_are_refused_by_name() {
    let (_folder, path) = written();
    let whole = fs::read_to_string(&path).expect("it was written");
    for (old, new, says) in [
        ("tiled:64:2:4:8:ahead", "tiled:64:2:4:8:behind", "is no tuning of decode"),
        ("tiled:64:2:4:8:ahead", "tiled:64:64:4:8", "can not run as"),
        ("tiled:64:2:4:8:ahead", "tiled:4294967295:4294967295:8:8", "can not run as"),
        ("tiled:64:2:4:8:ahead", "tiled:0:0:0:0", "can not run as"),
        // More loads than a row of codes has.
        ("tiled:64:2:4:8:ahead", "tiled:64:2:16:8:ahead", "can not run as"),
        ("kivi4/g4-d128", "kivi4/g99-d128", "is no class of formats"),
        ("kivi4/g4-d128", "kivi5/g4-d128", "is no class of formats"),
        ("few8x8x8x16:8", "few8x8x8x15:8", "no product is written"),
        ("\"general\",\n        \"product", "\"quick\",\n        \"product", "is no tuning of prefill"),
        ("\"cooperative_product\": null", "\"cooperative_product\": \"cooperative128x128\"", "subgroup tier"),
        ("\"cooperative_product\": null", "\"cooperative_product\": 7", "expected a string"),
        ("\"cooperative_product\"", "\"cooperative_produce\"", "unknown field"),
        ("tiled:64:64:4", "tiled:64:65:4", "is no tuning of score"),
        ("tiled:64:64:4", "tiled:4294967295:64:4", "is no tuning of score"),
        ("lanes:256:4", "lanes:255:4", "is no tuning of gather"),
        ("lanes:256:4", "tiled:64:64:4", "is no tuning of gather"),
        ("\"format\": 1", "\"format\": 2", "its format is 2"),
        ("\"format\": 1", "\"format\": -1", "invalid value"),
        ("\"choices\"", "\"chances\"", "unknown field"),
    ] {
        assert!(whole.contains(old), "'{old}' is in {whole}");
        fs::write(&path, whole.replacen(old, new, 1)).expect("it is written");
        let error = look_up(&path).expect_err(new).to_string();
        assert!(error.contains(says) && error.contains("tuning.json"), "{new}: {error}");
    }
    fs::write(&path, " ".repeat(2 << 20)).expect("it is written");
    assert!(look_up(&path).expect_err("too large").to_string().contains("larger than"), "size");
    fs::write(&path, [0xFF, 0xFE, 0x00]).expect("it is written");
    assert!(look_up(&path).is_err(), "no text");
    assert!(matches!(TuningFile::read(path.parent().expect("a folder")), Err(TuningFileError::Io { .. })), "a folder");
}

#[test]
fn the_file_lies_where_the_environment_says() {
    let with = |set: &[(&str, &str)]| {
        located(&|name| set.iter().find(|(n, _)| *n == name).map(|(_, value)| PathBuf::from(value)))
    };
    let named = with(&[("CONCERTINA_TUNING", "t.json"), ("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]);
    assert_eq!(named, Some(PathBuf::from("t.json")), "by name");
    assert_eq!(with(&[]), None, "nowhere");
    if cfg!(target_os = "linux") {
        let of = |set: &[(&str, &str)]| with(set).map(|path| path.display().to_string());
        let xdg = [("HOME", "/h"), ("XDG_CACHE_HOME", "/c")];
        assert_eq!(of(&xdg).as_deref(), Some("/c/concertina/tuning.json"), "XDG");
        assert_eq!(of(&[("HOME", "/h")]).as_deref(), Some("/h/.cache/concertina/tuning.json"), "home");
        assert_eq!(of(&[("HOME", "h")]), None, "a folder that is not absolute");
    }
}
