"""What benchmarks/best_of.py is made of: tasks, contestants, turns, comparison, tables."""
