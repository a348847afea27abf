"""Templates of the cards that go to the Hub with a model, a room that imports nothing. None is needed so far."""
