"""Charts and tables for pages and files."""
