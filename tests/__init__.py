"""The test suite: one folder a room, `helpers/` for what tests share, `architecture/` for the rules of the code."""
