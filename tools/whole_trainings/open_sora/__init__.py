"""Trainings of Open-Sora's versions under ColossalAI."""
