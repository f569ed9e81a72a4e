//! Byte counts for people.

/// `bytes` in the largest binary unit that leaves at least 1, with one decimal.
pub fn in_units(bytes: i128) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes.unsigned_abs() < 1024 {
        return format!("{bytes} B");
    }
    let sign = if bytes < 0 { "-" } else { "" };
    let magnitude = bytes.unsigned_abs();
    let step = (1..UNITS.len())
        .take_while(|step| magnitude >= 1 << (10 * (step + 1)))
        .count();
    let unit_bytes = 1_u128 << (10 * (step + 1));
    // Rounded down, so that a saving is never overstated.
    let tenths = magnitude * 10 / unit_bytes;
    format!("{sign}{}.{} {}", tenths / 10, tenths % 10, UNITS[step])
}

#[cfg(test)]
mod tests {
    use super::in_units;

    #[test]
    fn units_fit_the_size() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1023.9 KiB"),
            (1 << 20, "1.0 MiB"),
            (-(3 << 30), "-3.0 GiB"),
            (5_i128 << 50, "5120.0 TiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(in_units(bytes), text);
        }
    }
}
