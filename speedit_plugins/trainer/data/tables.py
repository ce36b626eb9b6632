"""Tables in CSV files."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path


def read_table(
    file: Path, columns: Sequence[str], *, optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """The last line of each row in the file, and its values by column; blank lines are no rows.

    White space at the ends of names and values is no part of them.

    Args:
        file: in UTF-8, with a line of column names.
        columns: those that it must have.
        optional: those that it may have, once.

    Raises:
        ValueError: no UTF-8 or no CSV, one of these columns missing or there twice, a row with more or fewer
            values than columns; names the file and, but for UTF-8, the line.
        OSError: the system fails to read the file.
    """
    try:
        # utf-8-sig: spreadsheets write a mark before the first column's name.
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for name in (*columns, *(name for name in optional if name in header)):
                if header.count(name) != 1:
                    got = ", ".join(header) or "nothing"
                    raise ValueError(f"{file}, line 1: wanted one column {name!r}, got {got}")
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    hint = "; a text with commas needs quotes" if len(fields) > len(header) else ""
                    got = f"wanted {len(header)} fields, got {len(fields)}{hint}"
                    raise ValueError(f"{file}, line {reader.line_num}: {got}")
                yield reader.line_num, dict(zip(header, map(str.strip, fields), strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} needs to be UTF-8: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: wanted CSV: {error}") from error
