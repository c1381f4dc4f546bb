"""Sources that make their rows: `data.source: sim:NAME`; the file's stem is the name, and there is no list to edit."""
