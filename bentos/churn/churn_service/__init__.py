"""The parts of the churn service. service.py makes a Bento service of them."""
