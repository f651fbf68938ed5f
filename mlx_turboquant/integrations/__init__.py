"""Host libraries this package plugs into."""
