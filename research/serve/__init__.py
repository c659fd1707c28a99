"""From a trained run to what others use: export."""
