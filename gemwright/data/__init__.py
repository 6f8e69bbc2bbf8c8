"""From a person's file to checked training examples."""
