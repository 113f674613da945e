"""What server, client and simulations share: types, formats and numbers, no decisions."""
