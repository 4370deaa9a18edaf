"""Searches over designs: which layouts, sizes and settings are fastest within a budget."""
