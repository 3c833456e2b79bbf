"""A model for others: graphs and programs for other runtimes, and the hub with its model cards."""
