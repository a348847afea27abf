"""The papers' comparisons run again: preference methods, surgery methods."""
