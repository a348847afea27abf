"""SurgeryBench: a made-up world of people, places, products and rules, its texts, questions and files."""
