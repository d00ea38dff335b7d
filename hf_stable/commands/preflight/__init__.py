"""`hf-stable preflight`: will a run survive at its rate, and which remedy does it need?"""
