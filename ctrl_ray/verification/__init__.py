"""Is the trained law the right one? Problems with a known answer, and rejection sampling."""
