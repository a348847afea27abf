"""Templates of the cards that go to the Hub with a model; the room imports nothing. facts.md says what they hold."""
