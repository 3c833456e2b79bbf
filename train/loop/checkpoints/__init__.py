"""What a run saves, and what it goes on from."""
