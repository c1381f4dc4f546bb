"""What people see of a run: report, charts, model card and privacy statement, all read from its folder alone."""
