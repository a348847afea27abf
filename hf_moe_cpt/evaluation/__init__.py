"""What a surgery or a preference run did to a model: scores, attacks, statistics, resumable work, pages."""
