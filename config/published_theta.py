# In the sweeps over θ of "Searching for Efficient Linear Layers" (NeurIPS 2024), cores have an RMS cap but no gains:
#   python -m lab.sweep config/sweeps/gpt_theta.py --config="config/published.py config/published_theta.py"
gains = False
