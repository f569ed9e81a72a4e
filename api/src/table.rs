//! Aligned columns for people: the first column to the left, numbers to the right.

use std::fmt;

/// A table under construction; [`fmt::Display`] prints it.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With these column heads.
    pub fn new(heads: &[&str]) -> Table {
        Table {
            rows: vec![heads.iter().map(ToString::to_string).collect()],
        }
    }

    /// Adds a row of as many cells as there are heads.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn width(&self, column: usize) -> usize {
        let cells = self.rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    }

    /// Whether all cells below the head begin like a number.
    fn is_numeric(&self, column: usize) -> bool {
        let mut cells = self.rows.iter().skip(1).filter_map(|row| row.get(column));
        column > 0 && cells.all(|cell| cell.starts_with(|c: char| c.is_ascii_digit() || c == '-'))
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns: Vec<(usize, bool)> = (0..self.rows[0].len())
            .map(|column| (self.width(column), self.is_numeric(column)))
            .collect();
        for row in &self.rows {
            let cells = row
                .iter()
                .zip(&columns)
                .map(|(cell, &(width, is_numeric))| {
                    if is_numeric {
                        format!("{cell:>width$}")
                    } else {
                        format!("{cell:<width$}")
                    }
                });
            let line = cells.collect::<Vec<_>>().join("  ");
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn columns_are_aligned_by_kind() {
        let mut table = Table::new(&["ID", "STATE", "PAGES"]);
        table.row(vec!["web1".into(), "Running".into(), "7".into()]);
        table.row(vec!["1".into(), "Paused".into(), "123456".into()]);
        let expected = "ID    STATE     PAGES\nweb1  Running       7\n1     Paused   123456\n";
        assert_eq!(table.to_string(), expected);
    }
}
