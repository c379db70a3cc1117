"""What people have drawn on slides. It knows neither networks nor training."""
