"""Which data made what: trace, withdraw, sweep."""
