"""From trainer to Hub and back: cards, checks before publishing, upcycling and conversion."""
