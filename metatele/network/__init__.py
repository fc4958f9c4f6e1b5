"""Any module: its layers, and what its passes show of them."""
