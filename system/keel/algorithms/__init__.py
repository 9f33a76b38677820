"""Objectives: advantages of groups, regularisers, and the loss that joins them."""
