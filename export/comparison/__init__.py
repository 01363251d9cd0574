"""Trains attention patterns on the same budget, and reports what each of them gains and costs."""
