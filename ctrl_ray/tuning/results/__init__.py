"""What a sweep found: trials, figures, report, tracking."""
